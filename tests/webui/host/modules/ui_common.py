def create_refresh_button(refresh_component, refresh_method, refreshed_args, elem_id):
    refresh_component.refreshed_args = refreshed_args
